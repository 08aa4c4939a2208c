"""The run directory: manifest, journal, outcomes, lock, budget, funnel.

Here the package's logger is made silent, as a library's should be: all modules that log import from here.
"""

import logging

logging.getLogger("intersafe").addHandler(logging.NullHandler())
