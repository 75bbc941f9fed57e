"""What is made of the rows: files, tables, pictures, the scaling law."""
