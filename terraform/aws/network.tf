data "aws_availability_zones" "here" {
  state = "available"
}

data "aws_ami" "debian" {
  for_each    = toset([for one in ["x86_64", "arm64"] : one if !contains(keys(var.images), one)])
  most_recent = true
  # Debian's own account.
  owners = ["136693071363"]
  filter {
    name   = "name"
    values = ["debian-12-*"]
  }
  filter {
    name   = "architecture"
    values = [each.key]
  }
}

locals {
  zones  = [for number in [0, 1] : try(data.aws_availability_zones.here.names[number], "${var.region}${["a", "b"][number]}")]
  places = distinct(concat(local.zones, sort([for mac in var.macs : mac.availability_zone])))
  ranges = { for number, zone in local.places : zone => cidrsubnet(var.cidr, 4, number) }
  images = merge({ for name, image in data.aws_ami.debian : name => image.id }, var.images)
  # Coordinators by name. They keep their addresses; the head's stands in every worker.
  coordinators = merge({ a = local.zones[0] }, var.coordinator.standby ? { b = local.zones[1] } : {})
  addresses    = { for name, zone in local.coordinators : name => cidrhost(local.ranges[zone], 10) }
  head_address = cidrhost(local.ranges[local.zones[0]], var.coordinator.standby ? 12 : 10)
  head         = "${local.head_address}:6379"
  setup        = file("${path.module}/../scripts/setup.sh")
  tags         = { farm = var.name }
  machine_policy = jsonencode({
    Version   = "2012-10-17"
    Statement = [{ Effect = "Allow", Action = "sts:AssumeRole", Principal = { Service = "ec2.amazonaws.com" } }]
  })
}

resource "aws_vpc" "farm" {
  cidr_block           = var.cidr
  enable_dns_hostnames = true
  tags                 = merge(local.tags, { Name = var.name })
}

resource "aws_internet_gateway" "farm" {
  vpc_id = aws_vpc.farm.id
  tags   = local.tags
}

# Machines have public addresses, which cost less than a NAT gateway, and no port that is open to them.
resource "aws_subnet" "machines" {
  for_each          = local.ranges
  vpc_id            = aws_vpc.farm.id
  availability_zone = each.key
  cidr_block        = each.value
  tags              = merge(local.tags, { Name = "${var.name}-${each.key}" })
}

resource "aws_route_table" "farm" {
  vpc_id = aws_vpc.farm.id
  route {
    cidr_block = "0.0.0.0/0"
    gateway_id = aws_internet_gateway.farm.id
  }
  tags = local.tags
}

resource "aws_route_table_association" "machines" {
  for_each       = aws_subnet.machines
  route_table_id = aws_route_table.farm.id
  subnet_id      = each.value.id
}

resource "aws_vpc_endpoint" "bucket" {
  vpc_id          = aws_vpc.farm.id
  service_name    = "com.amazonaws.${var.region}.s3"
  route_table_ids = [aws_route_table.farm.id]
  tags            = local.tags
}

# Ray's nodes dial each other on ports of their choice. No ssh: machines are reached through Systems Manager.
resource "aws_security_group" "farm" {
  name        = "${var.name}-farm"
  description = "Machines of the farm, among themselves"
  vpc_id      = aws_vpc.farm.id
  ingress {
    description = "Ray and HTTP among the farm's machines"
    from_port   = 0
    to_port     = 0
    protocol    = "-1"
    self        = true
  }
  egress {
    description = "Sources of fixed outputs, packages, and the services of AWS"
    from_port   = 0
    to_port     = 0
    protocol    = "-1"
    cidr_blocks = ["0.0.0.0/0"]
  }
  tags = local.tags
}

resource "aws_security_group" "clients" {
  name        = "${var.name}-clients"
  description = "HTTP of the coordinator, for clients"
  vpc_id      = aws_vpc.farm.id
  ingress {
    description = "HTTP of the coordinator"
    from_port   = 7878
    to_port     = 7878
    protocol    = "tcp"
    # With a front they are its clients.
    cidr_blocks = concat([var.cidr], var.front == null ? var.clients : [])
  }
  tags = local.tags
}
