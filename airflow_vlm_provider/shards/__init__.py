"""Where samples and media come from and where rows go. Knows neither models nor Airflow."""
