"""Networks in the files of other projects and in our portable folders."""
