"""Cards of data sets and adapters: pure functions from facts to Markdown."""
