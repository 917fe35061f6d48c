"""Tests of recbole_llm; data and helpers that they share stand in conftest.py and ring.py."""
