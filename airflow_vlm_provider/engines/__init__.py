"""Who answers. An engine turns requests into answers and knows neither shards nor Airflow."""
