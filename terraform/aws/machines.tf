locals {
  farm_toml = join("\n", [
    "host = \"0.0.0.0\"",
    "secrets_dir = \"/var/lib/drover/secrets\"",
    "ray_address = ${jsonencode(local.head)}",
    "public_url = ${jsonencode(local.url)}",
    "object_store_url = ${jsonencode("s3://${aws_s3_bucket.cache.bucket}/farm")}",
  ])
  url = var.front != null ? "https://${var.front.domain}" : var.public_url != "" ? var.public_url : "http://${local.addresses["a"]}:7878"
  # Values are quoted for the shell; none of them is a secret.
  common = {
    SOURCE_URL         = var.source_url
    SOURCE_SHA256      = var.source_sha256
    HEAD               = local.head
    TOKEN_SECRET       = aws_secretsmanager_secret.ray_token.name
    AWS_DEFAULT_REGION = var.region
  }
  user_data = {
    for name, values in merge(
      { for name, address in local.addresses : "coordinator-${name}" => {
        ROLE            = "coordinator"
        ADDRESS         = address
        FIRST           = name == "a" ? "yes" : "no"
        HEAD_HERE       = var.coordinator.standby ? "no" : "yes"
        FARM_TOML       = local.farm_toml
        FARM_SECRET     = aws_secretsmanager_secret.coordinators.name
        DATABASE        = "${aws_db_instance.farm.address}/drover"
        DATABASE_SECRET = try(aws_db_instance.farm.master_user_secret[0].secret_arn, "")
      } },
      var.coordinator.standby ? { head = { ROLE = "head", FARM_TOML = local.farm_toml } } : {},
      { for name, group in var.workers : "worker-${name}" => {
        ROLE    = "worker"
        GRACE_S = group.spot ? "90" : "3600"
        WATCH   = "yes"
        OPTIONS = join(" ", concat(["--slots ${group.slots}"], [for feature in group.features : "--feature ${feature}"]))
      } },
      { for name, mac in var.macs : "mac-${name}" => {
        ROLE    = "worker"
        GRACE_S = "3600"
        NAME    = name
        OPTIONS = "--slots ${mac.slots}"
      } },
    ) :
    name => join("\n", concat(
      ["#!/bin/sh"],
      [for key, value in merge(local.common, values) : "export ${key}='${replace(value, "'", "'\\''")}'"],
      [local.setup],
    ))
  }
}

resource "aws_iam_role" "machine" {
  for_each           = toset(["coordinator", "worker"])
  name               = "${var.name}-${each.key}"
  assume_role_policy = local.machine_policy
  tags               = local.tags
}

resource "aws_iam_role_policy_attachment" "session_manager" {
  for_each   = aws_iam_role.machine
  role       = each.value.name
  policy_arn = "arn:aws:iam::aws:policy/AmazonSSMManagedInstanceCore"
}

resource "aws_iam_role_policy" "coordinator" {
  name = "farm"
  role = aws_iam_role.machine["coordinator"].name
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Effect   = "Allow"
        Action   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
        Resource = ["${aws_s3_bucket.cache.arn}/farm/*"]
      },
      { Effect = "Allow", Action = ["s3:ListBucket"], Resource = [aws_s3_bucket.cache.arn] },
      {
        Effect   = "Allow"
        Action   = ["secretsmanager:GetSecretValue", "secretsmanager:PutSecretValue"]
        Resource = [aws_secretsmanager_secret.ray_token.arn, aws_secretsmanager_secret.coordinators.arn]
      },
      {
        Effect   = "Allow"
        Action   = ["secretsmanager:GetSecretValue"]
        Resource = [try(aws_db_instance.farm.master_user_secret[0].secret_arn, aws_secretsmanager_secret.ray_token.arn)]
      },
    ]
  })
}

# A worker, and a head alone, reads the Ray token and nothing else: it neither sees the bucket nor the database.
resource "aws_iam_role_policy" "worker" {
  name = "farm"
  role = aws_iam_role.machine["worker"].name
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect   = "Allow"
      Action   = ["secretsmanager:GetSecretValue"]
      Resource = [aws_secretsmanager_secret.ray_token.arn]
    }]
  })
}

resource "aws_iam_instance_profile" "machine" {
  for_each = aws_iam_role.machine
  name     = each.value.name
  role     = each.value.name
}

moved {
  from = aws_instance.coordinator
  to   = aws_instance.coordinator["a"]
}

resource "aws_instance" "coordinator" {
  for_each                    = local.coordinators
  ami                         = local.images["x86_64"]
  instance_type               = var.coordinator.instance_type
  subnet_id                   = aws_subnet.machines[each.value].id
  private_ip                  = local.addresses[each.key]
  associate_public_ip_address = true
  vpc_security_group_ids      = [aws_security_group.farm.id, aws_security_group.clients.id]
  iam_instance_profile        = aws_iam_instance_profile.machine["coordinator"].name
  user_data                   = local.user_data["coordinator-${each.key}"]
  user_data_replace_on_change = false
  metadata_options {
    http_endpoint = "enabled"
    http_tokens   = "required"
  }
  root_block_device {
    volume_size = var.coordinator.disk_gb
    volume_type = "gp3"
    encrypted   = true
  }
  tags = merge(local.tags, { Name = "${var.name}-coordinator-${each.key}" })
}

# Where a coordinator stands by, the head is nobody's: builds go on when the machine of one is lost.
resource "aws_instance" "head" {
  count                       = var.coordinator.standby ? 1 : 0
  ami                         = local.images["x86_64"]
  instance_type               = var.coordinator.head_type
  subnet_id                   = aws_subnet.machines[local.zones[0]].id
  private_ip                  = local.head_address
  associate_public_ip_address = true
  vpc_security_group_ids      = [aws_security_group.farm.id]
  iam_instance_profile        = aws_iam_instance_profile.machine["worker"].name
  user_data                   = local.user_data["head"]
  user_data_replace_on_change = false
  metadata_options {
    http_endpoint = "enabled"
    http_tokens   = "required"
  }
  root_block_device {
    volume_size = 20
    volume_type = "gp3"
    encrypted   = true
  }
  tags = merge(local.tags, { Name = "${var.name}-head" })
}

resource "aws_launch_template" "worker" {
  for_each               = var.workers
  name_prefix            = "${var.name}-${each.key}-"
  image_id               = local.images[each.value.architecture]
  instance_type          = each.value.instance_types[0]
  update_default_version = true
  # User data has at most 16 KiB.
  user_data = base64gzip(local.user_data["worker-${each.key}"])
  iam_instance_profile {
    name = aws_iam_instance_profile.machine["worker"].name
  }
  network_interfaces {
    associate_public_ip_address = true
    security_groups             = [aws_security_group.farm.id]
  }
  metadata_options {
    http_endpoint = "enabled"
    http_tokens   = "required"
  }
  block_device_mappings {
    device_name = "/dev/xvda"
    ebs {
      volume_size = each.value.disk_gb
      volume_type = "gp3"
      encrypted   = true
    }
  }
  tags = local.tags
}

resource "aws_autoscaling_group" "worker" {
  for_each            = var.workers
  name                = "${var.name}-${each.key}"
  min_size            = each.value.min
  max_size            = each.value.max
  desired_capacity    = each.value.desired
  vpc_zone_identifier = [for zone in local.zones : aws_subnet.machines[zone].id]
  capacity_rebalance  = each.value.spot
  mixed_instances_policy {
    instances_distribution {
      on_demand_percentage_above_base_capacity = each.value.spot ? 0 : 100
      spot_allocation_strategy                 = "price-capacity-optimized"
    }
    launch_template {
      launch_template_specification {
        launch_template_id = aws_launch_template.worker[each.key].id
        version            = "$Latest"
      }
      dynamic "override" {
        for_each = each.value.instance_types
        content {
          instance_type = override.value
        }
      }
    }
  }
  # A machine that is to go has an hour for its builds (drover-drain.service); spot machines have AWS' two minutes.
  initial_lifecycle_hook {
    name                 = "drain"
    lifecycle_transition = "autoscaling:EC2_INSTANCE_TERMINATING"
    heartbeat_timeout    = each.value.spot ? 120 : 3700
    default_result       = "CONTINUE"
  }
  dynamic "tag" {
    for_each = merge(local.tags, { Name = "${var.name}-${each.key}" })
    content {
      key                 = tag.key
      value               = tag.value
      propagate_at_launch = true
    }
  }
}

# A Mac is billed by its host, for 24 hours at least; AWS refuses to release one earlier, and scrubs it for an hour or
# more after each stop. So hosts are never replaced by a change of something else.
resource "aws_ec2_host" "mac" {
  for_each          = var.macs
  instance_type     = each.value.instance_type
  availability_zone = each.value.availability_zone
  auto_placement    = "off"
  tags              = merge(local.tags, { Name = "${var.name}-${each.key}" })
}

resource "aws_instance" "mac" {
  for_each                    = var.macs
  ami                         = var.images["mac"]
  instance_type               = each.value.instance_type
  tenancy                     = "host"
  host_id                     = aws_ec2_host.mac[each.key].id
  subnet_id                   = aws_subnet.machines[each.value.availability_zone].id
  associate_public_ip_address = true
  vpc_security_group_ids      = [aws_security_group.farm.id]
  iam_instance_profile        = aws_iam_instance_profile.machine["worker"].name
  user_data                   = local.user_data["mac-${each.key}"]
  user_data_replace_on_change = false
  metadata_options {
    http_endpoint = "enabled"
    http_tokens   = "required"
  }
  root_block_device {
    volume_size = 200
    volume_type = "gp3"
    encrypted   = true
  }
  tags = merge(local.tags, { Name = "${var.name}-${each.key}" })
}
