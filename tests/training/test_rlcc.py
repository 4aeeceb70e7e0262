"""The loop of RLCC: what a run leaves, where it stops, how it goes on, and what it says when something fails."""

from __future__ import annotations

import errno
import json
import resource
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
import rlcc_world  # noqa: E402
from rlcc_world import files, options, records  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from training import checkpoints, ppo, rlcc, rollouts, run_directory, run_log  # noqa: E402
from training.rlcc import Rlcc  # noqa: E402
from usp_env.records import RewardTerms  # noqa: E402

HEADER = 1  # sampled, it opens somebody else's turn, and is not trained
pytestmark = pytest.mark.assets


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USP_ENV_HOME", "")  # so that it is put back
        patch.delenv("USP_ENV_HOME")
        yield rlcc_world.make(tmp_path_factory.mktemp("rlcc"))


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("straight") / "out"
    rlcc.main(options(world, out, validate_every=2))
    return out


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


class Killed(BaseException):
    """Like a kill: nobody clears up behind it."""


def at_call(monkeypatch, owner: object, name: str, n: int, happens: Callable[[], object]) -> None:
    """The n-th call of a function is one of `happens` instead; those before and after are its own."""
    real, calls = getattr(owner, name), []

    def called(*args: object, **kwargs: object) -> object:
        calls.append(name)
        return happens() if len(calls) == n else real(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)


def raising(error: BaseException) -> Callable[[], object]:
    def happens() -> object:
        raise error

    return happens


def goes_on_as_if_nothing_had_happened(world: Path, out: Path, straight: Path, **more: object) -> None:
    rlcc.main(options(world, out, validate_every=2, resume=True, **more))
    assert files(out) == files(straight)


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_run_leaves(world, straight, capsys) -> None:
    assert {str(path.relative_to(straight)) for path in straight.rglob("*") if path.is_file()} == {
        "arguments.json",
        "metrics.jsonl",
        *(f"dialogues/step-{step:06d}.jsonl" for step in (1, 2, 3, 4)),
        *(f"{name}/adapter_{kind}" for name in ("best", "final") for kind in ("config.json", "model.safetensors")),
        *(
            f"checkpoints/step-00000{step}/{name}"
            for step in (3, 4)
            for name in ("state.json", *(f"{kind}.safetensors" for kind in ("weights", "policy_optimizer", "critic_optimizer")))
        ),
    }
    lines = records(straight)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [sorted(line).count("val_r_dpc") for line in lines] == [1, 0, 1, 0, 1]
    assert lines[1]["kl"] == 0.0
    assert lines[1]["first_ratio_error"] == lines[2]["first_ratio_error"] == 0.0
    assert lines[1]["grad_norm"] == 0.0  # the critic goes first
    assert lines[2]["grad_norm"] > 0.0
    for line, file in zip(lines[1:], sorted((straight / "dialogues").iterdir()), strict=True):
        said = [json.loads(text) for text in file.read_text("utf-8").splitlines()]
        assert len(said) == line["dialogues"] == 4
        assert all(one["profile_id"].startswith("virtual:") for one in said)
        assert line["reward"] == pytest.approx(np.mean([sum(one["rewards"]) for one in said if one["outcome"] == "completed"]))
        done = [one for one in said if one["outcome"] == "completed"]
        own = [i for one in done for m in one["messages"] if m["role"] == "user" for i in m["token_ids"] if i != HEADER]
        assert len(own) <= line["own_tokens"] <= 4 * 2 * 6


def test_the_final_adapter_is_the_policy_that_was_trained(world, straight) -> None:
    from peft import PeftModel

    base = transformers.AutoModelForCausalLM.from_pretrained(world / "model")
    model = PeftModel.from_pretrained(base, straight / "final", adapter_name="policy")
    trained = load_file(straight / "checkpoints" / "step-000004" / "weights.safetensors")
    named = dict(model.named_parameters())
    policy = {name.removeprefix("policy|"): tensor for name, tensor in trained.items() if name.startswith("policy|")}
    assert policy
    for name, tensor in policy.items():
        assert torch.equal(named[name].float(), tensor.to(torch.bfloat16).float())
        assert tensor.abs().max() > 0  # B began at zero


def test_a_run_that_is_begun_twice_is_the_same(world, straight, tmp_path) -> None:
    rlcc.main(options(world, tmp_path / "out", validate_every=2))
    assert files(tmp_path / "out") == files(straight)


def test_another_seed_is_another_run(world, straight, tmp_path) -> None:
    rlcc.main(options(world, tmp_path / "out", updates=1, seed=1))
    assert records(tmp_path / "out")[0]["reward"] != records(straight)[1]["reward"]


def test_a_whole_model(world, tmp_path) -> None:
    out = tmp_path / "out"
    rlcc.main(options(world, out, updates=2, full=True))
    with pytest.raises(SystemExit, match="RunDirectoryError: .*updates 2, now 3"):
        rlcc.main(options(world, out, updates=3, full=True, resume=True))
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "final")
    trained = load_file(out / "checkpoints" / "step-000002" / "weights.safetensors")
    assert all(torch.equal(p, trained[f"policy|{name}"]) for name, p in model.named_parameters())


def test_eq_6_by_its_weight(world, tmp_path) -> None:
    """λ = 0 leaves P(human) alone; a term is told without its weight."""
    rlcc.main(options(world, tmp_path / "out", updates=1, reward=None, **{"lambda": 0}))
    (line,) = records(tmp_path / "out")
    assert line["human"] == pytest.approx(line["reward"])
    assert "cycle" not in line


def test_real_people(world, tmp_path) -> None:
    rlcc.main(options(world, tmp_path / "out", updates=1, real_profiles=True))
    said = (tmp_path / "out" / "dialogues" / "step-000001.jsonl").read_text("utf-8").splitlines()
    assert all(json.loads(line)["profile_id"] in {f"p{i}" for i in range(12)} for line in said)


def test_the_people_of_validation_are_the_same_with_the_same_noise(world, tmp_path, monkeypatch) -> None:
    seen, roll = [], rlcc.roll

    def spying(conductor, agent, specs, lanes):
        seen.append(list(specs))
        return roll(conductor, agent, specs, lanes)

    monkeypatch.setattr(rlcc, "roll", spying)
    rlcc.main(options(world, tmp_path / "out", updates=2, validate_every=1, lr=0.0))
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]
    assert {spec.profile_id for spec in seen[0]} <= {f"p{i}" for i in range(12, 16)}
    assert len({spec.profile_id for spec in seen[0]}) == 3
    first, *others = [{k: v for k, v in line.items() if k.startswith("val_")} for line in records(tmp_path / "out")]
    assert first["val_n"] == 3
    assert others == [first, first]  # the policy has not moved, so nothing may have


# ── stops ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "said", "updates"),
    [
        ({"stop_kl": -1.0}, "stopped: KL 0.000 nats a token, --stop-kl -1.0", 1),
        ({"stop_minutes": 1e-9}, "stopped: 1e-09 minutes are over", 1),
        ({"validate_every": 1, "patience": 2, "lr": 0.0}, "stopped: r-DPC on val has not risen for 2 validations", 2),
    ],
    ids=["kl", "minutes", "patience"],
)
def test_stops(world, tmp_path, capsys, given, said, updates) -> None:
    out = tmp_path / "out"
    rlcc.main(options(world, out, checkpoint_every=9, **given))
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2] == said
    assert printed[-1].startswith("to go on: python -m training.rlcc --out ")
    assert records(out)[-1]["step"] == updates
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-00000{updates}"]
    assert (out / "final" / "adapter_model.safetensors").is_file()


def test_sigterm_finishes_the_update_and_the_command_that_it_prints_goes_on(
    world, straight, tmp_path, monkeypatch, capsys
) -> None:
    """Its out directory has a space in its name, and the reward an asterisk."""
    out = tmp_path / "a run"
    at_call(monkeypatch, rollouts, "learnable", 6, lambda: signal.raise_signal(signal.SIGTERM))  # a dialogue of update 2
    given = {"validate_every": 2, "checkpoint_every": 9, "reward": "1*rlcc_world:letters"}
    rlcc.main(options(world, out, **given))
    *_, why, command = capsys.readouterr().out.splitlines()
    assert why == "SIGTERM"
    assert [line["step"] for line in records(out)] == [0, 1, 2]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    words = shlex.split(command.removeprefix("to go on: "))
    assert words[:3] == ["python", "-m", "training.rlcc"]
    assert words[3:] == [*options(world, out, **given), "--resume"]
    rlcc.main(words[3:])
    assert "goes on after update 2" in capsys.readouterr().out
    assert [line["step"] for line in records(out)] == [0, 1, 2, 3, 4]


def test_sigterm_before_the_first_update(world, straight, tmp_path, monkeypatch, capsys) -> None:
    out, load = tmp_path / "out", rlcc.load_actor

    def loading(*args):
        signal.raise_signal(signal.SIGTERM)
        return load(*args)

    monkeypatch.setattr(rlcc, "load_actor", loading)
    rlcc.main(options(world, out, validate_every=2))
    assert capsys.readouterr().out.splitlines()[-2] == "SIGTERM"
    assert records(out) == []
    monkeypatch.setattr(rlcc, "load_actor", load)
    goes_on_as_if_nothing_had_happened(world, out, straight)


# ── going on ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("every", [1, 2], ids=["each", "every-second"])
def test_a_killed_run_goes_on_bit_by_bit(world, straight, tmp_path, monkeypatch, every) -> None:
    """Killed in update 4: weights, optimisers' moments, metrics and dialogues are those of the run that was not."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at_call(patch, rlcc.Learner, "update", 4, raising(Killed()))
        with pytest.raises(Killed):
            rlcc.main(options(world, out, validate_every=2, checkpoint_every=every))
    assert [line["step"] for line in records(out)] == [0, 1, 2, 3]
    assert checkpoints.Checkpoints(out / "checkpoints").latest().state["step"] == 4 - every
    rlcc.main(options(world, out, validate_every=2, resume=True))
    assert files(out) == files(straight)


@pytest.mark.parametrize("n", [1, 5, 6, 12])
def test_killed_anywhere_in_a_checkpoint(world, straight, tmp_path, monkeypatch, n) -> None:
    """Six flushes to the disk make a checkpoint: four files, the folder, and the folder that it is renamed into."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at_call(patch, checkpoints, "_flush", 4 + n, raising(Killed()))  # four are those of `best`, before any update
        with pytest.raises(Killed):
            rlcc.main(options(world, out, validate_every=2))
    found = checkpoints.Checkpoints(out / "checkpoints").latest()
    assert (0 if found is None else found.state["step"]) == n // 6
    goes_on_as_if_nothing_had_happened(world, out, straight)
    assert not list(out.rglob(".*"))  # and clears up


def test_a_cut_line_of_metrics_is_written_again(world, straight, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at_call(patch, rlcc.Learner, "update", 3, raising(Killed()))
        with pytest.raises(Killed):
            rlcc.main(options(world, out, validate_every=2))
    with open(out / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 3, "rew')
    goes_on_as_if_nothing_had_happened(world, out, straight)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(world, straight, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at_call(patch, rlcc.Learner, "update", 4, raising(Killed()))
        with pytest.raises(Killed):
            rlcc.main(options(world, out, validate_every=2))
    last = out / "checkpoints" / "step-000003"
    weights = bytearray((last / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (last / "weights.safetensors").write_bytes(weights)
    with pytest.raises(SystemExit, match=r"TrainingError: .*step-000003/weights.safetensors: expected the file .*delete"):
        rlcc.main(options(world, out, validate_every=2, resume=True))
    (last / "state.json").write_text("{", "utf-8")
    with pytest.raises(SystemExit, match=r"TrainingError: .*step-000003: expected a checkpoint.*delete it"):
        rlcc.main(options(world, out, validate_every=2, resume=True))
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    goes_on_as_if_nothing_had_happened(world, out, straight)


def test_a_finished_run_goes_on_to_nothing(world, straight, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    rlcc.main(options(world, out, updates=1))
    before = files(out)
    rlcc.main(options(world, out, updates=1, resume=True))
    assert files(out) == before
    assert capsys.readouterr().out.splitlines()[-1] == "done"


def test_only_the_run_that_was_begun_goes_on(world, tmp_path) -> None:
    out = tmp_path / "out"
    rlcc.main(options(world, out, updates=1))
    before = files(out)
    with pytest.raises(SystemExit, match=r"RunDirectoryError: .*take another, or --resume"):
        rlcc.main(options(world, out, updates=1))
    with pytest.raises(SystemExit, match=r"RunDirectoryError: .*begun with other arguments: lr 0.01, now 0.5; seed 0, now 3"):
        rlcc.main(options(world, out, updates=1, lr=0.5, seed=3, resume=True))
    assert files(out) == before
    rlcc.main(options(world, out, updates=1, stop_kl=3.0, lanes=2, checkpoint_every=7, resume=True))


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────


class Answers(BaseHTTPRequestHandler):
    """`/v1/chat/completions`: the last message, shortened; some are refused."""

    refused: Callable[[str], bool] = staticmethod(lambda said: False)
    served = 0

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        said = request["messages"][-1]["content"]
        Answers.served += 1
        message = {"choices": [{"message": {"role": "assistant", "content": f"You said {said[:4]!r}."}, "finish_reason": "stop"}]}
        body = json.dumps(message).encode()
        self.send_response(400 if Answers.refused(said) else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[str]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(Answers, "served", 0)
    yield f"openai:m@http://127.0.0.1:{made.server_port}/v1?timeout=2"
    made.shutdown()
    thread.join()
    made.server_close()


def test_the_response_model_dies_and_comes_back(world, server, tmp_path, monkeypatch) -> None:
    rlcc.main(options(world, tmp_path / "straight", assistant=server))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        Answers.served = 0
        patch.setattr(Answers, "refused", staticmethod(lambda said: Answers.served > 14))
        with pytest.raises(SystemExit) as ended:
            rlcc.main(options(world, out, assistant=server))
    assert str(ended.value).startswith("TrainingError: update 3: none of 4 dialogues may be learnt from (")
    assert "400" in str(ended.value)
    assert str(ended.value).endswith("mend the response model or the reward, then --resume from the last checkpoint")
    assert [line["step"] for line in records(out)] == [1, 2]
    rlcc.main(options(world, out, assistant=server, resume=True))
    assert files(out) == files(tmp_path / "straight")


def test_a_server_that_is_gone(world, tmp_path) -> None:
    closed = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    closed.server_close()
    spec = f"openai:m@http://127.0.0.1:{closed.server_port}/v1?timeout=0.5"
    with pytest.raises(SystemExit, match=r"TrainingError: update 1: none of 4 dialogues may be learnt from \(.*onnect"):
        rlcc.main(options(world, tmp_path / "out", assistant=spec))


def test_some_failures_are_counted_and_not_learnt_from(world, server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Answers, "refused", staticmethod(lambda said: sum(map(ord, said)) % 3 == 0))
    rlcc.main(options(world, tmp_path / "out", assistant=server, dialogues=8))
    lines = records(tmp_path / "out")
    for line, file in zip(lines, sorted((tmp_path / "out" / "dialogues").iterdir()), strict=True):
        said = [json.loads(text) for text in file.read_text("utf-8").splitlines()]
        assert line["invalid"] == sum(one["outcome"] == "infra_failure" for one in said)
        assert line["dialogues"] == 8
        assert line["learnt"] <= 8 - line["invalid"]
    assert sum(line["invalid"] for line in lines) >= 4
    assert all(np.isfinite(line["reward"]) for line in lines)


def test_a_reward_that_fails_on_some_dialogues(world, tmp_path) -> None:
    rlcc.main(options(world, tmp_path / "out", reward="rlcc_world:wanting", dialogues=12))
    for line, file in zip(records(tmp_path / "out"), sorted((tmp_path / "out" / "dialogues").iterdir()), strict=True):
        outcomes = [json.loads(text)["outcome"] for text in file.read_text("utf-8").splitlines()]
        assert line["invalid"] == outcomes.count("infra_failure") + outcomes.count("unscored") > 0
        assert line["learnt"] <= 12 - line["invalid"]


def test_a_reward_service_that_times_out(world, tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"TrainingError: update 1: none of 4 .*timed out after 3 attempts.*mend the response"):
        rlcc.main(options(world, out, reward="rlcc_world:timing_out"))
    assert not (out / "checkpoints").exists()
    assert not (out / "final").exists()


def test_a_validation_that_fails_tells_nothing_and_ends_nothing(world, tmp_path, monkeypatch) -> None:
    make = rlcc.Rlcc._conductor

    def making(self, sampler):
        made = make(self, sampler)
        if len(sampler.bank) == 4:
            made.partner = rlcc.assistants.load("openai:m@http://127.0.0.1:9/v1?timeout=0.2")
        return made

    monkeypatch.setattr(rlcc.Rlcc, "_conductor", making)
    rlcc.main(options(world, tmp_path / "out", updates=2, validate_every=1, patience=1))
    lines = records(tmp_path / "out")
    assert [line["val_n"] for line in lines] == [0, 0, 0]
    assert lines[0]["val_r_dpc"] is None
    assert not (tmp_path / "out" / "best").exists()


def test_a_loss_that_is_no_number(world, straight, tmp_path, monkeypatch) -> None:
    out, real, calls = tmp_path / "out", ppo.policy_loss, []

    def loss(*args, **kwargs):
        calls.append(1)
        found = real(*args, **kwargs)
        return found._replace(loss=found.loss * float("nan")) if len(calls) == 4 else found

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "policy_loss", loss)
        with pytest.raises(SystemExit, match=r"TrainingError: update 3: the policy's gradient is nan.*last checkpoint"):
            rlcc.main(options(world, out, validate_every=2))
    assert checkpoints.Checkpoints(out / "checkpoints").latest().state["step"] == 2
    goes_on_as_if_nothing_had_happened(world, out, straight)


def test_a_reward_that_is_no_number(world, tmp_path, monkeypatch) -> None:
    def rewards(profiles, dialogues):
        return [RewardTerms(dialogue={"nan": float("nan")}) for _ in dialogues]

    monkeypatch.setattr(rlcc_world.Wanting, "__call__", lambda self, profiles, dialogues: rewards(profiles, dialogues))
    with pytest.raises(SystemExit, match=r"SpecError: reward 'wanting': expected finite terms"):
        rlcc.main(options(world, tmp_path / "out", reward="rlcc_world:wanting"))


def no_room(monkeypatch, owner: object, name: str, n: int) -> None:
    """A disk without room for more than 2,000 bytes of a file, during the n-th call."""
    real, calls = getattr(owner, name), []

    def called(*args: object, **kwargs: object) -> object:
        calls.append(name)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if len(calls) == n:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            return real(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(owner, name, called)


@pytest.mark.parametrize(
    ("owner", "name", "n", "step"),
    [
        (checkpoints, "save_file", 4, 1),  # three files make a checkpoint
        (run_log, "write_whole", 4, 2),  # the first cuts the metrics, then come the dialogues
        (Rlcc, "_save", 1, 0),  # best, before any update
        (Rlcc, "_save", 2, 4),  # final: no validation was better than the first
    ],
    ids=["checkpoint", "dialogues", "best", "final"],
)
def test_a_full_disk(world, straight, tmp_path, monkeypatch, owner, name, n, step) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        no_room(patch, owner, name, n)
        with pytest.raises(SystemExit, match=r"TrainingError: .* cannot be written \(.*; mend that, then --resume"):
            rlcc.main(options(world, out, validate_every=2))
    found = checkpoints.Checkpoints(out / "checkpoints").latest()
    assert (0 if found is None else found.state["step"]) == step
    assert not list(out.rglob("*.new"))
    goes_on_as_if_nothing_had_happened(world, out, straight)


def test_an_out_directory_that_cannot_be_written(world, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(SystemExit, match=r"RunDirectoryError: --out .* cannot be written \(.*Not a directory.*take another"):
        rlcc.main(options(world, tmp_path / "file" / "out"))
    read_only = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(run_directory, "write_whole", lambda *args: raising(read_only)())
    with pytest.raises(SystemExit, match=r"RunDirectoryError: --out .* cannot be written \(.*Read-only file system"):
        rlcc.main(options(world, tmp_path / "out"))


def test_a_bank_that_is_too_small_says_what_to_ask_for(world, tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"SpecError: expected 5000 pairs, .*ask for fewer pairs"):
        rlcc.main(options(world, tmp_path / "out", pool=5000))
