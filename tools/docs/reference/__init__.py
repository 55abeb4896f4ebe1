"""Reference pages, generated from the code when the site is built.

Each module has one pure function for its page, which returns Markdown. `macros` collects
those that pages may call.
"""
