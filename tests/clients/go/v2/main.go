// The AWS SDK for Go, version 2.
package main

import (
	"context"

	"../client"
	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/sts"
)

func main() {
	client.Run(aws.SDKVersion, func() (client.Load, client.Identify) {
		ctx := context.Background()
		loaded, err := config.LoadDefaultConfig(ctx)
		if err != nil {
			panic(err)
		}
		load := func() (string, error) {
			value, err := loaded.Credentials.Retrieve(ctx)
			return value.AccessKeyID, err
		}
		identify := func() (string, error) {
			api := sts.NewFromConfig(loaded, func(options *sts.Options) { options.BaseEndpoint = aws.String(client.Endpoint()) })
			answer, err := api.GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{})
			if err != nil {
				return "", err
			}
			return *answer.Arn, nil
		}
		return load, identify
	})
}
