"""The Grafana dashboard for what the service gives Ray's metrics, and the way to Ray's Grafana."""
