"""Stands in for ``vllm serve`` where only the handle is tested: answers /health, and has a child of its own.

python stand_in.py PORT [stubborn | broken]
"""

import http.server
import signal
import subprocess
import sys
import time


class Health(http.server.BaseHTTPRequestHandler):
    """Always healthy."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return


def main() -> None:
    """Serve until killed; ``stubborn`` does not listen to SIGTERM, nor does its child."""
    port, how = int(sys.argv[1]), sys.argv[2]
    print(f"stand-in {how}", flush=True)
    if how == "broken":
        sys.exit("the model is not there")
    if how == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    time.sleep(0.3)
    http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()


if __name__ == "__main__":
    main()
