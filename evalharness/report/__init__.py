"""The report of one run, as a page, as Markdown and as JSON."""
