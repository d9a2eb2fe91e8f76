"""The paper's study: two families of models, trained, evaluated and compared."""
