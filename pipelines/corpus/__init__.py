"""The demo corpus: real text that the installation itself contains, so that nothing is downloaded.

sources.py reads text out of installed packages, recipe.py says which source feeds which file, build.py writes them.
"""
