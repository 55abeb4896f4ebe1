"""An S3 server for the tests of this folder."""

from tests.s3 import bucket, s3, s3_server  # noqa: F401  (fixtures)
