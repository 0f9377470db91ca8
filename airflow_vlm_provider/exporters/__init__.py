"""From rows to the files that training code reads. Pure: knows neither shards, stores nor Airflow."""
