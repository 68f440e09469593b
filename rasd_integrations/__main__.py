"""``python -m rasd_integrations``: the command line."""

from rasd_integrations.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
