"""`python -m intersafe` is `intersafe`."""

from intersafe.cli import main

main()
