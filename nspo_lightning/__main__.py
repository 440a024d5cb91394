"""``python -m nspo_lightning`` and `nspo-lightning`: a first screen of help appears at once, without torch."""

from __future__ import annotations

import sys

from nspo_lightning.command_face import help_text


def main() -> None:
    """Answer a call for help, else hand over to the command line proper."""
    text = help_text(sys.argv[1:])
    if text is not None:
        print(text)
        return
    from nspo_lightning.cli import main as run

    run()


if __name__ == "__main__":
    main()
