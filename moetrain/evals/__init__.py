"""Tasks that a model is judged by: multiple choice by log-likelihood, and answers it writes. From text to a table."""
