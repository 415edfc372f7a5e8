"""Generated messages and stubs of package `attendant.v1`; the .proto files beside them are the source."""
