// The AWS SDK for Go, version 1.
package main

import (
	"../client"
	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/session"
	"github.com/aws/aws-sdk-go/service/sts"
)

func main() {
	client.Run(aws.SDKVersion, func() (client.Load, client.Identify) {
		config := aws.NewConfig().WithEndpoint(client.Endpoint())
		made := session.Must(session.NewSession())
		load := func() (string, error) {
			value, err := made.Config.Credentials.Get()
			return value.AccessKeyID, err
		}
		identify := func() (string, error) {
			answer, err := sts.New(made, config).GetCallerIdentity(&sts.GetCallerIdentityInput{})
			if err != nil {
				return "", err
			}
			return *answer.Arn, nil
		}
		return load, identify
	})
}
