"""The form of a model that devices run well."""
