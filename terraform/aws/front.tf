# TLS in front. It asks each coordinator whether it works (one that stands by says 503), keeps nothing, and passes on every
# header, those for caches too; NARs come from the bucket, by the addresses that the coordinator sends.
locals {
  fronts = var.front == null ? [] : [var.front]
}

resource "aws_security_group" "front" {
  count       = length(local.fronts)
  name        = "${var.name}-front"
  description = "TLS in front of the coordinators"
  vpc_id      = aws_vpc.farm.id
  dynamic "ingress" {
    for_each = [443, 80]
    content {
      description = "HTTPS, and HTTP to be sent there"
      from_port   = ingress.value
      to_port     = ingress.value
      protocol    = "tcp"
      cidr_blocks = var.front.internal ? concat([var.cidr], var.clients) : ["0.0.0.0/0"]
    }
  }
  egress {
    description = "HTTP of the coordinators"
    from_port   = 7878
    to_port     = 7878
    protocol    = "tcp"
    cidr_blocks = [var.cidr]
  }
  tags = local.tags
}

resource "aws_lb" "front" {
  count                      = length(local.fronts)
  name                       = "${var.name}-front"
  internal                   = var.front.internal
  load_balancer_type         = "application"
  security_groups            = [aws_security_group.front[0].id]
  subnets                    = [for zone in local.zones : aws_subnet.machines[zone].id]
  drop_invalid_header_fields = true
  # Streams of events have a comment every ten seconds; a large upload may pause longer.
  idle_timeout = 120
  tags         = local.tags
}

resource "aws_lb_target_group" "coordinator" {
  count    = length(local.fronts)
  name     = "${var.name}-coordinator"
  port     = 7878
  protocol = "HTTP"
  vpc_id   = aws_vpc.farm.id
  # Requests that are under way when a coordinator ends.
  deregistration_delay = 30
  health_check {
    path                = "/healthz"
    matcher             = "200"
    interval            = 5
    timeout             = 3
    healthy_threshold   = 2
    unhealthy_threshold = 2
  }
  tags = local.tags
}

resource "aws_lb_target_group_attachment" "coordinator" {
  for_each         = var.front == null ? {} : local.coordinators
  target_group_arn = aws_lb_target_group.coordinator[0].arn
  target_id        = aws_instance.coordinator[each.key].id
  port             = 7878
}

resource "aws_lb_listener" "https" {
  count             = length(local.fronts)
  load_balancer_arn = aws_lb.front[0].arn
  port              = 443
  protocol          = "HTTPS"
  ssl_policy        = "ELBSecurityPolicy-TLS13-1-2-2021-06"
  certificate_arn   = var.front.certificate_arn
  default_action {
    type             = "forward"
    target_group_arn = aws_lb_target_group.coordinator[0].arn
  }
  tags = local.tags
}

resource "aws_lb_listener" "http" {
  count             = length(local.fronts)
  load_balancer_arn = aws_lb.front[0].arn
  port              = 80
  protocol          = "HTTP"
  default_action {
    type = "redirect"
    redirect {
      port        = "443"
      protocol    = "HTTPS"
      status_code = "HTTP_301"
    }
  }
  tags = local.tags
}

resource "aws_route53_record" "front" {
  count   = try(var.front.zone_id, "") == "" ? 0 : 1
  zone_id = var.front.zone_id
  name    = var.front.domain
  type    = "A"
  alias {
    name                   = aws_lb.front[0].dns_name
    zone_id                = aws_lb.front[0].zone_id
    evaluate_target_health = true
  }
}
