"""`python -m intersafe` is `intersafe`."""

from intersafe.cli.main import main

main()
