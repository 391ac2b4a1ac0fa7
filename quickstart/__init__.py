"""What only the quickstart needs: the digits as image folders, and the report at its end."""
