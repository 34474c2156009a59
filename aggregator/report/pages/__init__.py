"""What each report shows, one module per report: `page` lays out figures and sentences that were decided before."""
