"""Pictures of a hyperparameter search, as files: ``raylit.plots.search(results)``. Floor 2, driver.

They need ``raylit[plots]``. Importing this loads no matplotlib; drawing leaves pyplot and all settings alone.
"""

from raylit.plots.of_search import search

__all__ = ["search"]
