"""``python -m gpt2`` and ``torchrun ... -m gpt2`` are the command line."""

from gpt2.cli import main

if __name__ == "__main__":
    main()
