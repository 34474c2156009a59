"""The aggregator: turns what nodes reported into rollups, reports and alerts. Stateless; cron starts it."""
