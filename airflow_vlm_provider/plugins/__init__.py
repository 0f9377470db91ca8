"""Airflow integration."""
