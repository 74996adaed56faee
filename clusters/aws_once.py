"""What aws-cpu.yaml and aws-gpu-spot.yaml need in an AWS account and region, once; it can be run again.

    python clusters/aws_once.py --region us-west-2 --bucket my-runs --ssh-from 203.0.113.7

- a security group ``raylit``: its hosts reach each other on all ports, and ssh is open to one address, or to none. The
  one that Ray makes where none is named lets the whole world in on port 22.
- a private, encrypted bucket for runs and checkpoints.
- roles ``raylit-head`` (launches and ends workers, uses the bucket) and ``raylit-worker`` (uses the bucket). Ray's own
  role may do anything in EC2 and S3, and is the head's alone: its workers cannot write a checkpoint.
- the role that AWS itself wants before an account's first spot instance.

It prints what to write into the two files. It needs boto3, and the credentials of somebody who may make these things.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import sys
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ProfileNotFound

NAME = "raylit"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--region", required=True, help="where the hosts and the bucket will be")
    parser.add_argument("--bucket", required=True, help="its name; made unless it is yours already")
    parser.add_argument(
        "--ssh-from", required=True, type=allowed, metavar="ADDRESS",
        help="yours (`curl https://checkip.amazonaws.com` prints it), or a range such as 203.0.113.0/24; "
        "none: no port at all, for AWS's Session Manager",
    )  # fmt: skip
    parser.add_argument("--vpc", help="the VPC's id; else the region's default one")
    given = parser.parse_args(arguments)
    try:
        bucket(given.region, given.bucket)
        group = security_group(given.region, given.ssh_from, given.vpc)
        roles(given.region, given.bucket)
    except ClientError as error:
        print(f"aws_once.py: AWS refused: {error.response['Error']['Message']}", file=sys.stderr)
        return 1
    except BotoCoreError as error:  # no credentials, no way to AWS
        no_login = isinstance(error, (NoCredentialsError, ProfileNotFound))
        step = "; run `aws configure`, or export AWS_PROFILE=NAME" if no_login else ""
        print(f"aws_once.py: {error}{step}", file=sys.stderr)
        return 1
    print(f"(1) region: {given.region}, and one of its zones")
    print(f"(2) SecurityGroupIds: [{group}]")
    print(f"(3) RAYLIT_STORAGE=s3://{given.bucket}/runs")
    return 0


def allowed(text: str) -> str | None:
    """An address or range that may come in by ssh; None for "none". What would let in the world is refused."""
    if text == "none":
        return None
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no address; give yours, a range, or none") from None
    if network.prefixlen < (16 if network.version == 4 else 32):
        size = f"{network.num_addresses} addresses" if network.prefixlen else "the whole world"
        raise argparse.ArgumentTypeError(
            f"{text} lets in {size}; give your own, as `curl https://checkip.amazonaws.com` prints it"
        )
    return str(network)


def bucket(region: str, name: str) -> None:
    """A private bucket, encrypted, that no policy or list can open to the public."""
    s3 = boto3.client("s3", region_name=region)
    # us-east-1 is the only region that must not be named.
    where: Any = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    try:
        s3.create_bucket(Bucket=name, **where)
    except ClientError as error:
        if error.response["Error"]["Code"] != "BucketAlreadyOwnedByYou":
            raise
    closed = dict.fromkeys(
        ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets"), True
    )  # fmt: skip
    s3.put_public_access_block(Bucket=name, PublicAccessBlockConfiguration=closed)
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
    s3.put_bucket_encryption(Bucket=name, ServerSideEncryptionConfiguration={"Rules": [rule]})


def security_group(region: str, ssh_from: str | None, vpc: str | None) -> str:
    """The group's id; its rules are made anew, so that an address of last week is out."""
    ec2 = boto3.client("ec2", region_name=region)
    if vpc is None:
        found = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
        if not found:
            raise SystemExit(f"aws_once.py: {region} has no default VPC; name one with --vpc, with a public subnet")
        vpc = found[0]["VpcId"]
    filters = [{"Name": "group-name", "Values": [NAME]}, {"Name": "vpc-id", "Values": [vpc]}]
    groups = ec2.describe_security_groups(Filters=filters)["SecurityGroups"]
    if groups:
        group, old = groups[0]["GroupId"], groups[0]["IpPermissions"]
    else:
        about = "raylit's clusters: everything among themselves, ssh from one address"
        group, old = ec2.create_security_group(GroupName=NAME, Description=about, VpcId=vpc)["GroupId"], []
    if old:
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=old)
    # Ray, gloo and NCCL choose their ports freely.
    rules: list[dict[str, Any]] = [{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}]
    if ssh_from is not None:
        ranges = {"Ipv6Ranges": [{"CidrIpv6": ssh_from}]} if ":" in ssh_from else {"IpRanges": [{"CidrIp": ssh_from}]}
        rules.append({"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, **ranges})
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=rules)
    return str(group)


def roles(region: str, bucket_name: str) -> None:
    """The roles of the hosts, and the instance profiles that hand them out; their policies are written anew."""
    iam = boto3.client("iam", region_name=region)  # it has no regions, but signs for one
    use_the_bucket = [
        {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetBucketLocation"],
         "Resource": f"arn:aws:s3:::{bucket_name}"},
        {"Effect": "Allow", "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"],
         "Resource": f"arn:aws:s3:::{bucket_name}/*"},
    ]  # fmt: skip
    worker = role(iam, f"{NAME}-worker", use_the_bucket)
    try:
        iam.create_service_linked_role(AWSServiceName="spot.amazonaws.com")
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("InvalidInput", "EntityAlreadyExists"):
            raise  # else the account has had spot instances before
    its_own = {"StringLike": {"aws:ResourceTag/ray-cluster-name": f"{NAME}-*"}}
    role(iam, f"{NAME}-head", [
        *use_the_bucket,
        # Launching asks for rights on images, networks and disks too, which have no tags of ours: by region only.
        {"Effect": "Allow", "Action": ["ec2:RunInstances", "ec2:CreateTags"], "Resource": "*",
         "Condition": {"StringEquals": {"aws:RequestedRegion": region}}},
        {"Effect": "Allow", "Action": ["ec2:TerminateInstances", "ec2:StopInstances", "ec2:StartInstances"],
         "Resource": "*", "Condition": its_own},
        {"Effect": "Allow", "Action": ["ec2:Describe*"], "Resource": "*"},
        {"Effect": "Allow", "Action": ["ssm:GetParameters"], "Resource": "arn:aws:ssm:*::parameter/aws/service/*"},
        {"Effect": "Allow", "Action": ["iam:PassRole"], "Resource": worker},  # to hand it to a worker, and no other one
    ])  # fmt: skip


def role(iam: Any, name: str, statements: list[dict[str, Any]]) -> str:
    """A role for EC2 instances and its profile, both of this name; its ARN."""
    service = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    try:
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=_policy([service]))
    except iam.exceptions.EntityAlreadyExistsException:
        pass
    iam.put_role_policy(RoleName=name, PolicyName=NAME, PolicyDocument=_policy(statements))
    # For ssh through Session Manager; it opens no port.
    iam.attach_role_policy(RoleName=name, PolicyArn="arn:aws:iam::aws:policy/AmazonSSMManagedInstanceCore")
    try:
        iam.create_instance_profile(InstanceProfileName=name)
    except iam.exceptions.EntityAlreadyExistsException:
        pass
    if not iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    return str(iam.get_role(RoleName=name)["Role"]["Arn"])


def _policy(statements: list[dict[str, Any]]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": statements})


if __name__ == "__main__":
    sys.exit(main())
