"""``python -m nspo_lightning`` and `nspo-lightning`: a first screen of help appears at once, without torch."""

from __future__ import annotations

import os
import sys

from nspo_lightning.cli.help import help_text


def main() -> None:
    """Answer a call for help, else hand over to the command line proper."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "60")  # bars of libraries, read at import: a line a minute in a log
    try:
        text = help_text(sys.argv[1:])
        if text is not None:
            print(text, flush=True)
            return
        from nspo_lightning.cli.app import main as run

        run()
    except BrokenPipeError:  # `... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at its exit
        sys.exit(1)


if __name__ == "__main__":
    main()
