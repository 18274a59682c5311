"""The jobs behind the public functions of rqtool/api.py: what a user asks for, from files in to a
result out."""
