"""The aggregator: turns telemetry into rollups, reports and alerts. Stateless; started by cron."""
