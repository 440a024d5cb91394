"""``python -m nspo_lightning``."""

from nspo_lightning.command_face import main

if __name__ == "__main__":
    main()
