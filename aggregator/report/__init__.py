"""What reports show (pages/) and how they look (html.py, markdown.py, pdf.py); nothing is decided here."""
