"""``python -m weight_transfer`` is the ``weight-transfer`` command."""

from weight_transfer.cli import main

if __name__ == "__main__":
    main()
