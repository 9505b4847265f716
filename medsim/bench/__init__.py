"How policies are judged and compared."
