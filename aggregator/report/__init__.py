"""What reports say (contents.py) and how they look (pdf.py, markdown.py)."""
