"""``airl-fast study``: a grid of runs, seeds by variants, measured, compared and written as a page.

spec      the YAML file, checked          cells     what is run, in which order
costs     how long a cell takes           runner    worker processes, progress, failures
results   means, spreads and differences  page      tables and plots, as Markdown and HTML
"""
