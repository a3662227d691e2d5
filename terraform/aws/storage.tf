resource "aws_s3_bucket" "cache" {
  bucket_prefix = "${var.name}-cache-"
  force_destroy = var.cache.force_destroy
  tags          = local.tags
}

resource "aws_s3_bucket_public_access_block" "cache" {
  bucket                  = aws_s3_bucket.cache.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_server_side_encryption_configuration" "cache" {
  bucket = aws_s3_bucket.cache.id
  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "AES256"
    }
  }
}

# drover deletes what nothing keeps; here only what it cannot see. Versions stay off: each would be kept for ever.
resource "aws_s3_bucket_lifecycle_configuration" "cache" {
  bucket = aws_s3_bucket.cache.id
  rule {
    id     = "uploads-that-were-given-up"
    status = "Enabled"
    filter {
      prefix = ""
    }
    abort_incomplete_multipart_upload {
      days_after_initiation = 2
    }
  }
}

resource "aws_security_group" "database" {
  name        = "${var.name}-database"
  description = "PostgreSQL, for the coordinator"
  vpc_id      = aws_vpc.farm.id
  ingress {
    description     = "PostgreSQL from machines of the coordinator"
    from_port       = 5432
    to_port         = 5432
    protocol        = "tcp"
    security_groups = [aws_security_group.clients.id]
  }
  tags = local.tags
}

resource "aws_db_subnet_group" "farm" {
  name       = var.name
  subnet_ids = [for zone in local.zones : aws_subnet.machines[zone].id]
  tags       = local.tags
}

resource "aws_db_instance" "farm" {
  identifier        = var.name
  engine            = "postgres"
  engine_version    = "16"
  instance_class    = var.coordinator.database_class
  allocated_storage = var.coordinator.database_gb
  db_name           = "drover"
  username          = "drover"
  # RDS makes the password and keeps it in Secrets Manager: it is in no state and no plan.
  manage_master_user_password = true
  db_subnet_group_name        = aws_db_subnet_group.farm.name
  vpc_security_group_ids      = [aws_security_group.database.id]
  publicly_accessible         = false
  storage_encrypted           = true
  backup_retention_period     = 7
  deletion_protection         = true
  final_snapshot_identifier   = "${var.name}-last"
  tags                        = local.tags
}

# Its value comes from the coordinator's first start, so that Terraform never has it.
resource "aws_secretsmanager_secret" "ray_token" {
  name        = "${var.name}/ray-token"
  description = "Opens every node of the farm's Ray cluster"
  tags        = local.tags
}

# What coordinators share: the API token, the secret of leases and the signing key, which the first one makes on its first
# start. A machine in the place of another takes them from here.
resource "aws_secretsmanager_secret" "coordinators" {
  name        = "${var.name}/coordinators"
  description = "API token, upload secret and signing key of the farm's coordinators"
  tags        = local.tags
}
