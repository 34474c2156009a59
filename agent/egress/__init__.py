"""Providers outside the rack. The only package that speaks to one; it sends nothing but what redaction has made."""
