"""Seeds: seed files and importers."""
