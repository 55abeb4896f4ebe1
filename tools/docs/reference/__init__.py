"""Reference pages, generated from the code when the site is built.

Each module has one pure function for its page, which returns Markdown. `tools.docs.macros` makes
them callable in pages.
"""
