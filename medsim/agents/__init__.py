"How a policy learns from practice, K policies side by side; the tabular learners of ICU-Sepsis."
