"""`fen bench report`: one HTML file, and Markdown, from the JSON files of the other benchmarks."""
