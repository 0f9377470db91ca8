"""What is asked of the model and what is made of its answer. Pure: no network, no disk, no Airflow."""
