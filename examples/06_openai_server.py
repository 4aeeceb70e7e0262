"""A simulated user talks to any OpenAI-compatible server.

    python examples/06_openai_server.py                              # a small server of its own; needs no key and no model
    python examples/06_openai_server.py --url http://localhost:8000/v1 --model NAME --user usp-mini
    python examples/06_openai_server.py --url https://HOST/v1 --model NAME --key-env OPENAI_API_KEY

A call that fails does not raise: it ends the episode as an `infra_failure` with `valid=False`, which no trainer learns from.
"""

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gymnasium as gym

import usp_env
from usp_env import users


class RuleServer(BaseHTTPRequestHandler):
    """`/v1/chat/completions`, answered by a rule."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """One reply."""
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        topic = " ".join(request["messages"][-1]["content"].split()[:8])
        message = {"role": "assistant", "content": f"About “{topic} …”: take it one step at a time. What have you tried?"}
        body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Quiet: the conversation is what is shown."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="base url of the server, ending in /v1; several, separated by commas, are balanced")
    parser.add_argument("--model", default="rule", help="the model's name there")
    parser.add_argument("--key-env", help="NAME of the environment variable that holds the key")
    parser.add_argument("--user", default="scripted", help="who plays the user, e.g. usp-mini")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()

    if args.url is None:
        server = ThreadingHTTPServer(("127.0.0.1", 0), RuleServer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        args.url = f"http://127.0.0.1:{server.server_port}/v1"
    spec = f"openai:{args.model}@{args.url}" + (f"?key_env={args.key_env}" if args.key_env else "")

    # The server's model answers as the assistant; the agent, here a simulated user, has the other seat.
    env = gym.make("usp_env/User-v0", assistant=spec, reward=None, max_turns=args.turns)
    user = users.load(args.user)
    observation, info = env.reset(seed=args.seed)
    print(f"assistant: {spec}\nuser: {user.spec}, profile {info['profile_id']}\n")
    over = False
    while not over:
        view = usp_env.Dialogue.of(info["messages"]).view_for("user", info["target_profile"])
        reply = user.respond([view], [args.seed + info["turn"]])[0]
        action = reply.text + (usp_env.END if reply.ended else "")
        observation, _, terminated, truncated, info = env.step(action)
        over = terminated or truncated
    for message in info["messages"]:
        print(f"{message['role']:>9}: {message['content']}")
    print(f"\nended: {info['end_reason']}, outcome {info['outcome']}, valid {info['valid']}, usage {info['usage']}")


if __name__ == "__main__":
    main()
