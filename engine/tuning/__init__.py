"""Settings of a study, proposed and tried."""
