"""``airflow vlm``: what people ask and do at a prompt."""
