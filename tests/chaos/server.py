"""The summaries' server of a schedule: ``server.py PORT FLAG [HOST]``. While the file FLAG exists, it answers 503."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.summarize.server import Handler, Server, good

ANSWER_SECONDS = 0.02
"""So long does a model think at least; a schedule needs some time to happen in."""


def main(port: int, flag: Path, host: str) -> None:
    def answer(handler: Handler, body: dict, tries: int) -> None:
        time.sleep(ANSWER_SECONDS)
        if flag.exists():
            handler.reply({"error": {"message": "out of memory"}}, 503)
        else:
            good(handler, body, tries)

    Server(answer, port, host).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
